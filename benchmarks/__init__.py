"""How fast this project is, against Keras, PyTorch and ONNX Runtime on the same work in the same minutes.

`make bench` installs what is compared with, measures (`python -m benchmarks`), keeps the figures in `results/` and puts
the tables made of them into docs/benchmarks.md. `make tpu-report` says what the compiler makes of the same programs on
a TPU.
"""
