"""Differential privacy: what a step costs, who may still step, and the books of both."""
