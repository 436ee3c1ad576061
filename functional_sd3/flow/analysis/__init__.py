"""Measurements of a flow: divergence, likelihood, inversion, adjoint gradients, geometry, curvature, spectra."""
