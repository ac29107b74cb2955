"""`python -m fastvae train`: the command and all that it needs."""
