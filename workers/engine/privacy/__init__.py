"""Differentially private training: gradients of each unit, their clipping, noise.

A unit is what is protected: a datum, or all datums of one person. One backward pass gives every
unit its own gradient of A and B; `docs/privacy.md` has the whole picture.
"""
