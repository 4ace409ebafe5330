"""MTCNN face detector: the three networks in PyTorch, and their export to ONNX.

Architecture: K. Zhang, Z. Zhang, Z. Li, Y. Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded
Convolutional Networks", arXiv 1604.02878. Module names and layer sizes follow the state dicts in the PyPI package
`facenet-pytorch` 2.6.0 (MIT), so its `pnet.pt`, `rnet.pt` and `onet.pt` load strictly. The pyramid, the boxes and the
non-maximum suppression around the networks are in `pidiff.runtime.mtcnn`, which needs no torch.

    python -m pidiff.export.mtcnn WEIGHTS_DIR OUT_DIR
"""

import argparse
from pathlib import Path

import torch
from torch import nn


class PNet(nn.Module):
    """Proposal network, fully convolutional: image [B,3,H,W] -> offsets [B,4,h,w], probabilities [B,2,h,w].

    h = ceil((H - 2) / 2) - 4, the same for w: one window of 12 px every 2 px.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, image):
        x = self.pool1(self.prelu1(self.conv1(image)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class RNet(nn.Module):
    """Refinement network: image [B,3,24,24] -> offsets [B,4], probabilities [B,2]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, image):
        x = self.pool(self.prelu1(self.conv1(image)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


class ONet(nn.Module):
    """Output network: image [B,3,48,48] -> offsets [B,4], landmarks [B,10] (five x, five y), probabilities [B,2]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.pool, self.pool3 = nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, image):
        x = self.pool(self.prelu1(self.conv1(image)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


def _flatten(x):
    """[B,C,H,W] -> [B,W*H*C]: the weights come from Caffe through MATLAB, whose arrays are column-major."""
    return x.permute(0, 3, 2, 1).flatten(1)


# name -> (module, example input, dynamic axes of the input, output names)
_NETS = {
    "pnet": (PNet, (1, 3, 64, 48), {2: "height", 3: "width"}, ("offsets", "probabilities")),
    "rnet": (RNet, (2, 3, 24, 24), {0: "batch"}, ("offsets", "probabilities")),
    "onet": (ONet, (2, 3, 48, 48), {0: "batch"}, ("offsets", "landmarks", "probabilities")),
}


def load_net(name, weights_dir):
    """Return `pnet`, `rnet` or `onet` in eval mode with the weights of `weights_dir`/NAME.pt, loaded strictly."""
    module = _NETS[name][0]().eval()
    path = Path(weights_dir) / f"{name}.pt"
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return module


def export_mtcnn(weights_dir, out_dir):
    """Write face_pnet.onnx, face_rnet.onnx and face_onet.onnx (opset 18, weights inside) and return their paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (_, shape, dynamic, outputs) in _NETS.items():
        path = out_dir / f"face_{name}.onnx"
        axes = {axis: torch.export.Dim.DYNAMIC for axis in dynamic}
        program = torch.onnx.export(
            load_net(name, weights_dir), (torch.zeros(shape),), dynamo=True, opset_version=18, verbose=False,
            input_names=["image"], output_names=list(outputs), dynamic_shapes=(axes,),
        )
        _name_axes(program.model.graph, dynamic)
        _strip_metadata(program.model.graph)
        program.save(path, external_data=False)
        paths.append(path)
    return paths


def _name_axes(graph, dynamic):
    """Give the dynamic axes their names; the output sizes of PNet are `rows` and `columns`."""
    image = graph.inputs[0]
    names = {str(image.shape[axis]): name for axis, name in dynamic.items()}
    for value in (image, *graph.outputs):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                value.shape[axis] = names.get(str(size), ("batch", "", "rows", "columns")[axis])


def _strip_metadata(graph):
    """Drop the exporter's notes on every node: they hold stack traces with the paths of the exporting machine."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m pidiff.export.mtcnn", description=__doc__.splitlines()[0])
    parser.add_argument("weights_dir", help="folder with pnet.pt, rnet.pt, onet.pt (facenet-pytorch 2.6.0, data/)")
    parser.add_argument("out_dir", help="folder that receives face_pnet.onnx, face_rnet.onnx, face_onet.onnx")
    args = parser.parse_args(argv)
    for path in export_mtcnn(args.weights_dir, args.out_dir):
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
