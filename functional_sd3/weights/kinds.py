"""What a file is, told by how it begins: what people take for weights and is none, and what is read another way."""

HOW_TO_CONVERT = (
    "is a pickle, which may run code when it is opened; where you trust it, convert it: "
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "state = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); state = state.get('state_dict', state); "
    "parts = [(k, x if isinstance(x, dict) else {'': x}) for k, x in state.items()]; "
    "save_file({f'{k}.{n}' if n else k: v.clone() for k, x in parts for n, v in x.items()}, sys.argv[2])\" "
    "IN OUT.safetensors"
)
ZIP = b"PK\3\4"
GGUF = b"GGUF"
_PICKLES = (ZIP, *(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5)))


def stranger(start: bytes) -> str | None:
    """What a file that is no safetensors file is, as the end of a sentence; None where that is not known."""
    text = start.lstrip().lower()
    if start.startswith(_PICKLES):
        return HOW_TO_CONVERT
    if start.startswith(GGUF):
        return "is a GGUF file: only components of a model are read from these, by weights.load"
    if text.startswith(b"version https://git-"):
        return "is a pointer of Git LFS to the weights, not the weights: fetch them with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: what was downloaded is the answer to a wrong address or a missing login"
    return None
