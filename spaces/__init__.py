"""What can be asked, and what it should cost. Pure: no torch, no Ray."""
