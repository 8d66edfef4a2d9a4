"""How one trial trains and reports. Knows nothing of Optuna, Tune or MLflow."""
