"""Other packages with fastvae's kernels, by one line each: `fastvae.integrations.scvi.patch()`."""
