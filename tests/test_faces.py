"""Reading photos, finding faces, aligning them, removing the background."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from drawn_face import POINTS, drawn_face
from tiny_bundle import FACE_MODELS, spec_of

from pidiff.runtime import images
from pidiff.runtime.engines import load_engine
from pidiff.runtime.errors import FaceError
from pidiff.runtime.faces import FaceReader, align_face, ffhq_quad, to_image, to_planes
from pidiff.runtime.mtcnn import _AreaSampler, _nms


@pytest.fixture(scope="module")
def reader():
    engines = {}

    def load(name):
        if name not in engines:
            path = FACE_MODELS / f"{name}.onnx"
            engines[name] = load_engine("onnxruntime")(path, spec_of(path), threads=2)
        return engines[name]

    return FaceReader(load, 64, matting=False)


def png(width, height, rows=1):
    """A PNG file whose header claims a size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = zlib.compress(b"\0" * ((width * 3 + 1) * rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encode(image, kind):
    return cv2.imencode(kind, image[..., ::-1])[1].tobytes()


def with_orientation(jpeg, value):
    """Insert an EXIF segment with an orientation into JPEG bytes."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, value, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


# --- detection -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [96, 256, 1500])
def test_landmarks_of_a_known_face(reader, size):
    found = reader.detect(drawn_face(size))
    assert len(found) == 1 and found.scores[0] > 0.9
    error = np.hypot(*(found.points[0] - POINTS * size / 256).T)
    assert error.max() < 0.035 * size


def test_detection_is_deterministic_and_follows_the_picture(reader):
    face, canvas = drawn_face(200), np.full((300, 420, 3), 128, np.uint8)
    canvas[60:260, 170:370] = face
    first, again = reader.detect(canvas), reader.detect(canvas)
    assert np.array_equal(first.points, again.points)
    assert np.abs(first.points[0] - (POINTS * 200 / 256 + [170, 60])).max() < 8


def test_area_sampler_is_adaptive_average_pooling():
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    sampler = _AreaSampler(image)

    def slow(picture, height, width):
        out = np.zeros((3, height, width))
        for i in range(height):
            for j in range(width):
                y, x = (slice(k * n // m, -(-(k + 1) * n // m)) for k, n, m in
                        ((i, picture.shape[0], height), (j, picture.shape[1], width)))
                out[:, i, j] = picture[y, x].reshape(-1, 3).mean(0)
        return (out - 127.5) * 0.0078125

    for size in ((37, 53), (12, 20), (60, 70)):
        assert np.abs(sampler.resize(*size) - slow(image, *size)).max() < 1e-5
    boxes = np.array([[3.7, 5.2, 20.9, 22.1, 0.9], [-4.0, -6.0, 10.0, 8.0, 0.8], [60.0, 0.0, 90.0, 30.0, 0.7]])
    crops, kept = sampler.crops(boxes, 24)
    assert np.array_equal(kept, boxes[:2])  # the third lies outside
    assert np.abs(crops[0] - slow(image[4:22, 2:20], 24, 24)).max() < 1e-5
    assert np.abs(crops[1] - slow(image[0:8, 0:10], 24, 24)).max() < 1e-5


def test_nms_keeps_the_best_of_overlapping_boxes():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [2, 2, 6, 6]], np.float32)
    scores = np.array([0.8, 0.9, 0.7, 0.95])
    assert _nms(boxes, scores, 0.5).tolist() == [3, 1, 2]
    assert _nms(boxes, scores, 0.5, smaller=True).tolist() == [3, 2]
    assert _nms(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize("name", ["pnet", "rnet", "onet"])
def test_torch_networks_match_the_shipped_graphs(name):
    """The graphs' weights, loaded strictly into the PyTorch modules, give the graphs' outputs."""
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    from pidiff.export import mtcnn as export

    path = FACE_MODELS / f"face_{name}.onnx"
    graph = onnx.load(path).graph
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    module = export._NETS[name][0]().eval()
    keys = module.state_dict()
    slopes = [node.input[1] for node in graph.node if node.op_type == "PRelu"]  # the exporter renames only these
    weights.update(zip(sorted(k for k in keys if k.startswith("prelu")), map(weights.get, slopes)))
    module.load_state_dict({k: weights[k].reshape(v.shape) for k, v in keys.items()})
    shape = {"pnet": (1, 3, 45, 60), "rnet": (3, 3, 24, 24), "onet": (3, 3, 48, 48)}[name]
    image = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    spec, engine = spec_of(path), load_engine("onnxruntime")(path, spec_of(path), threads=2)
    from pidiff.runtime.engines import call

    with torch.no_grad():
        expected = module(torch.from_numpy(image))
    rows, columns = (-(-(n - 2) // 2) - 4 for n in shape[2:])
    got = call(engine, {"image": image}, rows=rows, columns=columns)
    for tensor, want in zip(spec.outputs, expected):
        assert np.abs(got[tensor.name] - want.numpy()).max() < 1e-4


# --- choosing a face -------------------------------------------------------------------------------------------------

def scene(*sizes):
    """Faces of these sizes side by side."""
    height = max(sizes)
    tiles = [np.pad(drawn_face(s), ((height - s, 0), (0, 0), (0, 0)), constant_values=150) for s in sizes]
    return np.concatenate(tiles, 1)


def test_no_face(reader):
    with pytest.raises(FaceError, match="photo must show a face, got none"):
        reader.read(np.full((200, 300, 3), 90, np.uint8))
    with pytest.raises(FaceError, match="photo must show a face, got none"):
        reader.read(np.zeros((5, 5, 3), np.uint8))


def test_several_faces(reader):
    picture = scene(160, 256)
    with pytest.raises(FaceError, match="photo must show one face, got 2"):
        reader.read(picture)
    largest = reader.read(picture, "largest")
    alone = reader.read(np.ascontiguousarray(picture[:, 160:]))
    assert np.abs(largest.astype(int) - alone).mean() < 6
    with pytest.raises(FaceError, match="select must be 'only' or 'largest', got 'first'"):
        reader.read(picture, "first")


def test_passers_by_do_not_count(reader):
    assert len(reader.detect(scene(75, 512))) == 1


def test_tiny_face(reader):
    big = FaceReader(reader._load, 256, matting=False)
    with pytest.raises(FaceError, match=r"photo must show a face large enough for a crop of 128 pixels .* got \d+"):
        big.read(drawn_face(96))
    assert reader.read(drawn_face(96)).shape == (64, 64, 3)


# --- alignment -------------------------------------------------------------------------------------------------------

def turned(points, degrees, scale, centre):
    a = np.deg2rad(degrees)
    return ((points - 128) * scale @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + centre).astype(np.float32)


@pytest.mark.parametrize("degrees, scale", [(0, 1.0), (17, 1.3), (-40, 3.0), (3, 0.4)])
def test_alignment_samples_the_quad(degrees, scale):
    """On a picture whose colours are its coordinates, every output pixel shows where it was read."""
    side = 1400
    y, x = np.mgrid[:side, :side]
    picture = np.stack([x, y, 0 * x], -1) * (255 / side)
    points = turned(POINTS, degrees, scale, (700, 690))
    centre, half_x, half_y = ffhq_quad(points)
    face = align_face(picture.round().astype(np.uint8), points, 64)
    u, v = ((np.arange(64) + 0.5) / 32 - 1)[None, :, None], ((np.arange(64) + 0.5) / 32 - 1)[:, None, None]
    expected = (centre + u * half_x + v * half_y) * (255 / side)
    assert np.abs(face[..., :2] - expected).max() < 1.5


def test_quad_follows_the_ffhq_formula():
    points = np.array([[40, 50], [60, 50], [50, 60], [42, 70], [58, 70]], np.float32)
    centre, x, y = ffhq_quad(points)
    # eyes 20 apart, mouth 20 below: x = (20, 0) - (20, 0) * (-1, 1) = (40, 0), made 40 long (2 * 20 > 1.8 * 20)
    assert np.allclose(centre, [50, 52]) and np.allclose(x, [40 * 256 / 262.3, 0]) and np.allclose(y, [0, 40 * 256 / 262.3])


def test_crop_over_the_edge_is_mirrored_not_black():
    face = drawn_face(256)
    cut = np.ascontiguousarray(face[60:, 80:])
    aligned = align_face(cut, POINTS - [80, 60], 64)
    whole = align_face(face, POINTS, 64)
    assert aligned.shape == (64, 64, 3) and aligned.min() > 5
    assert np.abs(aligned[20:50, 24:50].astype(int) - whole[20:50, 24:50]).mean() < 2  # inside, nothing changes
    assert aligned[:4].std() < whole.std()  # outside, it fades


def test_planes_and_back():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    planes = to_planes(image)
    assert planes.shape == (1, 3, 6, 4) and planes.min() >= -1 and planes.max() <= 1
    assert np.array_equal(to_image(planes)[0], image)
    assert to_image(np.array([[[[9.0]], [[-9.0]], [[0.0]]]])).tolist() == [[[[255, 0, 128]]]]


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp"])
def test_reads_the_formats(tmp_path, kind):
    picture = drawn_face(100)
    (tmp_path / "p").write_bytes(encode(picture, kind))
    image = images.read_image(tmp_path / "p")
    assert image.shape == (100, 100, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture).mean() < 6
    width, height, _ = images.parse_header("p", encode(picture[:, :60], kind))
    assert (width, height) == (60, 100)


def test_lossless_webp_size():
    data = cv2.imencode(".webp", drawn_face(64)[:, :50], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert data[12:16] == b"VP8L" and images.parse_header("p", data)[:2] == (50, 64)


@pytest.mark.parametrize("orientation, turn", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]),
                                               (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))])
def test_exif_orientation(tmp_path, orientation, turn):
    picture = drawn_face(96)[:, :72]
    (tmp_path / "p.jpg").write_bytes(with_orientation(encode(picture, ".jpg"), orientation))
    image = images.read_image(tmp_path / "p.jpg")
    assert image.shape == turn(picture).shape
    assert np.abs(image.astype(int) - turn(picture)).mean() < 6


def test_transparency_becomes_white(tmp_path):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4] = (10, 20, 30, 255)
    (tmp_path / "p.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    image = images.read_image(tmp_path / "p.png")
    assert image[0, 0].tolist() == [30, 20, 10] and image[7, 7].tolist() == [255] * 3


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (8193, 10), (7000, 7000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_huge_pictures_are_refused_before_decoding(tmp_path, monkeypatch, width, height):
    (tmp_path / "p.png").write_bytes(png(width, height, rows=0))
    monkeypatch.setattr(images, "opencv", lambda: pytest.fail("decoded"))
    with pytest.raises(FaceError, match=f"photo must have at most 8192 pixels a side and 40 million in all, got {width}x{height}"):
        images.read_image(tmp_path / "p.png")


def test_huge_array():
    with pytest.raises(FaceError, match="got 9000x1"):
        images.read_image(np.zeros((1, 9000, 3), np.uint8))


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_wrong_arrays(array):
    with pytest.raises(FaceError, match="photo must be a uint8 array"):
        images.read_image(array)


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n" * 40, b"GIF89a" + b"\0" * 50, b"%PDF-1.7"])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "p.jpg").write_bytes(content)
    with pytest.raises(FaceError, match="photo must be a PNG, JPEG or WebP picture, got .*p.jpg"):
        images.read_image(tmp_path / "p.jpg")


@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("part", [0.002, 0.05, 0.5, 0.95])
def test_truncated_pictures(tmp_path, kind, part):
    data = encode(drawn_face(128), kind)
    (tmp_path / "p").write_bytes(data[:max(4, int(len(data) * part))])
    with pytest.raises(FaceError, match="photo must be"):
        images.read_image(tmp_path / "p")


def test_garbage_behind_a_good_header(tmp_path):
    data = bytearray(encode(drawn_face(128), ".png"))
    data[60:-40] = bytes(len(data) - 100)
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(FaceError, match="photo must be"):
        images.read_image(tmp_path / "p")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FaceError, match="photo must be a picture file, got .*which does not exist"):
        images.read_image(tmp_path / "none.png")
    with pytest.raises(FaceError, match="which is a folder"):
        images.read_image(tmp_path)
