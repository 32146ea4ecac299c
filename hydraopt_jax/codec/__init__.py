"""The codec: factors in quantizer steps become bytes, and bytes become factors. Arrays and bytes, no files.

- `contexts`: the statistical model: the context of a vector, and the symbols of its codes.
- `frequency_tables`: integer frequencies of the symbols in each context, and their bytes.
- `trellis`: the dependent quantizer (JAX).
- `noise_shaping`: the same with errors that go where a quadratic form of them is small (JAX).
- `quantization`: either of them on chunks of many streams.
- `rans`: the entropy coder, many lanes side by side (NumPy, integers only).
- `streams`: the codes of a leaf as lanes and as bytes.
- `prediction`: vectors predicted from vectors decoded before, exact on every machine.
- `syntax`: which factor lies in which leaf, and the side information of a leaf.
- `encode` quantizes and writes, `decode` reads. Nothing that `decode` imports needs JAX.
"""
