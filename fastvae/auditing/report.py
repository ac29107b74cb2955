"""What an audit says."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from .trace import Line

__all__ = ["Audit", "Finding", "Latent", "formula"]


def _where(file: str | None, line: int | None) -> str:
    """As short as it is clear."""
    if file is None:
        return "an unknown line"
    path, here = Path(file), Path.cwd()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"


_FORMULAS = {
    "sampling": "z = mu + exp(0.5 * logvar) * torch.randn_like(mu)",
    "kl": "kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar), summed over all dimensions but the "
    "first",
    "loss": "loss = (kl + nll).mean(), kl and nll summed over all dimensions but the first",
    "nll": "nll = (summed over all dimensions but the first) -log p(x | z)",
    "bound": "logvar = logvar.clamp(-30, 10), or bound=fastvae.Bound(-30, 10)",
}


def formula(name: str) -> str:
    return _FORMULAS[name]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        kind: its name, such as "kl-averaged".
        says: what is wrong, in words.
        measured: the number that shows it; what it is, `says` tells.
        right: the right formula.
        file, line: of the program; None where no line can be named.
    """

    kind: str
    says: str
    measured: float | None
    right: str
    file: str | None = None
    line: int | None = None

    @classmethod
    def at(
        cls, line: Line | None, kind: str, says: str, measured: float | None, right: str
    ) -> Finding:
        where = (line.file, line.number) if line else (None, None)
        return cls(kind, says, measured, formula(right), *where)

    @property
    def where(self) -> str:
        return _where(self.file, self.line)

    def __str__(self) -> str:
        says = textwrap.fill(self.says, 96, initial_indent="    ", subsequent_indent="    ")
        return f"{self.kind}  {self.where}\n{says}\n    right: {self.right}"


@dataclasses.dataclass(frozen=True)
class Latent:
    """What was measured of one Gaussian latent variable.

    Attributes:
        shape: of z, with the batch.
        file, line: where z is made.
        carrier: what sigma is made of: "logvar", "log_std", "std", "var", or another form.
        kl: "closed form", "samples", or why its KL was not checked.
        prior: "N(0, I)", "Gaussian", or "" where that is not known.
        weight: of the KL of one example in the sum of the batch, times the number of examples where
            the loss is a mean; None where it is not known.
    """

    shape: tuple[int, ...]
    file: str | None
    line: int | None
    carrier: str
    kl: str
    prior: str
    weight: float | None

    def __str__(self) -> str:
        weight = "" if self.weight is None else f", weight {self.weight:.4g}"
        prior = f" to {self.prior}" if self.prior else ""
        return (
            f"z {list(self.shape)} at {_where(self.file, self.line)}, sigma from "
            f"{self.carrier or '?'}; KL{prior}: {self.kl}{weight}"
        )


@dataclasses.dataclass
class Audit:
    """The outcome: `ok` if there are no findings.

    Attributes:
        findings: the faults.
        latents: what was measured of each latent variable.
        likelihood: what was measured of the likelihood, in words.
        notes: what could not be checked, and why.
        effective_beta: weight of the KL over that of the likelihood, of the first latent variable
            for which both are known.
    """

    findings: list[Finding]
    latents: list[Latent]
    likelihood: str
    notes: list[str]
    effective_beta: float | None

    @property
    def ok(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"latent      {latent}" for latent in self.latents]
        lines.append(f"likelihood  {self.likelihood}")
        if self.effective_beta is not None:
            lines.append(f"beta        {self.effective_beta:.4g}, effective")
        lines += [f"not checked {note}" for note in self.notes]
        for finding in self.findings:
            lines += ["", str(finding)]
        n = len(self.findings)
        return "\n".join([*lines, "", f"{n} fault{'s' * (n > 1)}" if n else "no fault was found"])
