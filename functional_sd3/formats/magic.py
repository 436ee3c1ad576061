"""Identify file types by their leading bytes."""

HOW_TO_CONVERT = (
    "is a pickle, which may run code when it is opened; where you trust it, convert it: "
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "state = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); state = state.get('state_dict', state); "
    "parts = [(k, x if isinstance(x, dict) else {'': x}) for k, x in state.items()]; "
    "save_file({f'{k}.{n}' if n else k: v.clone() for k, x in parts for n, v in x.items() if hasattr(v, 'clone')}, "
    'sys.argv[2])" '
    "IN OUT.safetensors"
)
ZIP = b"PK\3\4"
GGUF = b"GGUF"
_PICKLES = (ZIP, *(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5)))


_IMAGE = "is an image, not weights (images are given with --image or --control)"
_ARCHIVE = "is an archive, not weights: unpack it, and give what is in it"
_OTHERS = (
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF"), _IMAGE),
    ((b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), _ARCHIVE),
    ((b"ftrt", b"ptrt"), "is a TensorRT engine, for one kind of GPU only: give the weights it was built from"),
    ((b"\x89HDF",), "is an HDF5 file, of which nothing is read: convert it to safetensors"),
    ((b"%PDF",), "is a PDF, not weights"),
)


def foreign_kind(start: bytes) -> str | None:
    """The type of a file that is not safetensors, as the end of a sentence ("is a ..."); None if it is unknown."""
    text = start.lstrip().lower()
    if start.startswith(_PICKLES):
        return HOW_TO_CONVERT
    if start.startswith(GGUF):
        return "is a GGUF file: only models, ControlNets, IP-Adapters and CLIP are read from these"
    if text.startswith(b"version https://git-"):
        return "is a pointer of Git LFS to the weights, not the weights: fetch them with `git lfs pull`"
    for marks, what in _OTHERS:
        if start.startswith(marks):
            return what
    if start[4:8] == b"ftyp":
        return _IMAGE
    # Protocol buffers of an ONNX model: its version, then the name of the program that wrote it.
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x1a") and start[1] < 32:
        return "is an ONNX model, of which nothing is read: give the weights it was made from, as safetensors"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: what was downloaded is the answer to a wrong address or a missing login"
    return None
