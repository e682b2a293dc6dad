"""The torch backend: frozen base models, one LoRA adapter for each run, and what trains them.

It knows neither gRPC nor protos: it takes the dataclasses of `workers.operations`, so a test, a
notebook or a benchmark can drive it without a server.
"""
