"""What every side needs to speak `tensafe.v1`: tensors, errors, channel options.

Client, coordinator and workers meet only through `protos/`; this package is the hand-written part
of that contract for Python. It knows gRPC and NumPy, and nothing of the three.
"""
