"""What is wrong with a VAE's loss, found by running it: see `fastvae.audit`."""

from .auditor import audit
from .report import Audit, Finding, Latent

__all__ = ["Audit", "Finding", "Latent", "audit"]
