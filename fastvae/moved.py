"""Modules under the names that they had in version 0.1, for what was pickled then."""

import importlib
import sys

_NAMES = {
    "bounds": "ops.bounds",
    "cholesky": "models.cholesky",
    "distributions": "models.distributions",
    "functional": "ops",
    "importance": "models.importance",
    "likelihoods": "models.likelihoods",
    "log_probs": "ops.pixels",
    "objectives": "models.objectives",
    "penalties": "models.penalties",
    "pixel_likelihoods": "models.likelihoods.pixels",
    "priors": "models.priors",
    "vae": "models.vae",
}

for _old, _new in _NAMES.items():
    sys.modules[f"fastvae.{_old}"] = importlib.import_module(f"fastvae.{_new}")
