"""What measures model files: nothing here needs more than Python's own library.

It is what torchfuse measures with on this machine, and it is pushed to devices as it is, where
neither torchfuse nor torch need be installed. There it can be used by itself, too:

    python3 -m torchfuse.runner --input 1x3x224x224 model.pte other.pte

A model is loaded and run in a process of its own (a worker), which does what it is told, one JSON
object a line: load a model, warm up, take a turn of so many calls. What runs a `.pte` is
ExecuTorch's own bindings where they are installed, else executorch-numpy-runtime, which needs no
torch.
"""
