"""A bundle as frozen graphs: TorchScript, ONNX, compiled packages; each verified against the baked model."""
