"""Kernels that can be read, imported and run as they stand; `render` replaces what is between markers."""
