"""The VAE around the ops: distributions, priors, likelihoods, objectives, and what judges them."""
