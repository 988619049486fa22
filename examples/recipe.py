"""PyTorch's "Fuse Modules" recipe, as it was written, on today's PyTorch.

`torchfuse.` stands where torch no longer does it, and lines that the recipe should have had are
marked. It writes model.pt and model_fused.pt, and the same for the lite interpreter, where it is
run; then measure both, here or on a phone:

speed_benchmark_torch --model=model.pt --input_dims="1,3,224,224" --input_type="float"
speed_benchmark_torch --model=model_fused.pt --input_dims="1,3,224,224" --input_type="float"
"""

import torch

import torchfuse


class AnnotatedConvBnReLUModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3, bias=False).to(dtype=torch.float)
        self.bn = torch.nn.BatchNorm2d(5).to(dtype=torch.float)
        self.relu = torch.nn.ReLU(inplace=True)
        self.quant = torch.quantization.QuantStub()
        self.dequant = torch.quantization.DeQuantStub()

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.quant(x)
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.dequant(x)
        return x


model = AnnotatedConvBnReLUModel()
model.eval()  # missing, 1: batch norms as they are used, which is also when they can be folded
print(model)


def prepare_save(model, fused):
    model.qconfig = torch.quantization.get_default_qconfig("qnnpack")
    torch.quantization.prepare(model, inplace=True)
    model(torch.rand(8, 3, 224, 224))  # missing, 2: calibration; take a hundred of your own images
    torch.quantization.convert(model, inplace=True)
    torchscript_model = torch.jit.script(model)
    torchscript_model_optimized = torchfuse.optimize_for_mobile(torchscript_model)
    name = "model" if not fused else "model_fused"
    torch.jit.save(torchscript_model_optimized, f"{name}.pt")
    torchscript_model_optimized._save_for_lite_interpreter(f"{name}.ptl")


prepare_save(model, False)

model = AnnotatedConvBnReLUModel()
model.eval()  # missing, 1
fusions = [["bn", "relu"]]
fusions = [["conv", "bn", "relu"]]  # missing, 3: the conv, with which batch norm and ReLU vanish
model_fused = torchfuse.fuse_modules(model, fusions, inplace=False)
print(model_fused)

prepare_save(model_fused, True)
