"""`python -m fastvae`: see `fastvae.cli`."""

from fastvae.cli import main

raise SystemExit(main())
