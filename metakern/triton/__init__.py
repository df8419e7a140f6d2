"""The operators as Triton kernels, one file each; importing it needs the package triton."""
