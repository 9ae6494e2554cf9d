"""Export of a bundle to frozen graphs (TorchScript, ONNX, compiled packages), each verified against the baked model."""
