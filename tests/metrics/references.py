"""Results of the reference packages for reproducible inputs: see `references.json`.

pytorch-fid, torch-fidelity and prdc need a torchvision that does not load beside this torch, so they are no
requirement of the tests: their results are recorded. `python -m tests.metrics.references` computes them again, in an
environment that has torchvision 0.28.0, pytorch-fid 0.3.0, torch-fidelity 0.4.0 and prdc 0.2 (all installed with
`--no-deps`) and scipy 1.17.
"""

import json
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.metrics import inception

RECORDED = Path(__file__).with_suffix(".json")
KEPT = 24
"""Features kept of an image at each tap, evenly spaced."""


def results() -> dict:
    return json.loads(RECORDED.read_text())


def random_params() -> dict:
    """Inception parameters under which features keep the size of the input, norms far from the identity."""
    # One draw shared by all leaves, each from a place of its own: a draw for each takes ten times as long.
    draw = prng.normal(prng.key(15), 1_000_003)

    def fill(path: str, param: specs.Param) -> Tensor:
        size = math.prod(param.shape)
        place = zlib.crc32(path.encode()) % len(draw)
        values = draw.roll(-place).repeat(-(-size // len(draw)))[:size].reshape(param.shape)
        if path.endswith("conv.weight"):
            return values * math.sqrt(2 / math.prod(param.shape[1:]))
        if path.endswith(("bn.weight", "bn.running_var")):
            return 1 + 0.25 * values.tanh()
        return 0.02 * values if path == "fc.weight" else 0.1 * values

    return specs.map_params(fill, inception.spec())


def images() -> Tensor:
    """Bytes (2, 3, 299, 299): noise, and noise of large blots."""
    noise = prng.uniform(prng.key(1), (1, 3, 299, 299))
    blots = torch.nn.functional.interpolate(prng.uniform(prng.key(2), (1, 3, 13, 13)), (299, 299), mode="nearest")
    return (torch.cat([noise, blots]) * 255).round().to(torch.uint8)


def kept(features: Tensor) -> list[list[float]]:
    return features.double()[:, :: features.shape[1] // KEPT][:, :KEPT].tolist()


FRECHET = {
    "more samples than dimensions": (300, 250, 64),
    "fewer samples than dimensions": (40, 50, 64),
    "fewer in one set": (40, 300, 64),
    "Inception's dimensions, few samples": (150, 120, 2048),
}


def features(count: int, width: int, seed: int) -> Tensor:
    """Features (count, width), not negative, correlated, of unequal variances; another seed is another distribution."""
    first, second, third = prng.split(prng.key(seed), 3)
    hidden = min(width, 100)
    mixed = prng.normal(first, (count, hidden)) @ prng.normal(second, (hidden, width)) / hidden**0.5
    return (mixed + 0.3 * prng.normal(third, (count, width)) + 0.1 * seed).relu()


def sets() -> tuple[Tensor, Tensor]:
    """Real features (90, 64) and generated ones (65, 64), of which some are near real ones."""
    real = features(90, 64, 1)
    return real, torch.cat([features(60, 64, 2), real[:5] * 1.01])


def logits() -> Tensor:
    return 3 * prng.normal(prng.key(4), (57, 1008))


def _ask() -> dict:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return {"inception": _networks(), "frechet": _distances(), "features": _features_metrics(), "isc": _isc()}


def _networks() -> dict:
    import tempfile

    import pytorch_fid.inception as pytorch_fid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = tree.flatten_paths(random_params())
    pytorch_fid.load_state_dict_from_url = lambda *_, **__: state
    network = pytorch_fid.InceptionV3([0, 1, 2, 3], resize_input=False, normalize_input=False).eval()
    names = ["64", "192", "768", "2048", "logits", "logits_unbiased"]
    with tempfile.NamedTemporaryFile(suffix=".pth") as file, torch.no_grad():
        torch.save(state, file.name)
        fidelity = FeatureExtractorInceptionV3("", names, feature_extractor_weights_path=file.name)
        theirs = network(images() / 255 * 2 - 1)
        return {
            "pytorch-fid": {str(part.shape[1]): kept(part.mean((2, 3))) for part in theirs},
            "torch-fidelity": dict(zip(names, map(kept, fidelity(images())), strict=True)),
        }


def _distances() -> dict:
    import numpy
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    results = {}
    for name, (n, m, width) in FRECHET.items():
        both = [features(n, width, 1).double().numpy(), features(m, width, 2).double().numpy()]
        (mean_a, mean_b), (cov_a, cov_b) = zip(
            *((values.mean(0), numpy.cov(values, rowvar=False)) for values in both), strict=True
        )
        fidelity = fid_statistics_to_metric({"mu": mean_a, "sigma": cov_a}, {"mu": mean_b, "sigma": cov_b}, False)
        results[name] = {
            "pytorch-fid": float(calculate_frechet_distance(mean_a, cov_a, mean_b, cov_b)),
            "torch-fidelity": float(fidelity["frechet_inception_distance"]),
        }
    return results


def _features_metrics() -> dict:
    import sys
    import types

    from scipy.spatial.distance import cdist
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    # All that prdc takes of scikit-learn.
    sklearn = types.ModuleType("sklearn")
    sklearn.metrics = types.ModuleType("sklearn.metrics")
    sklearn.metrics.pairwise = types.SimpleNamespace()
    sklearn.metrics.pairwise_distances = lambda x, y, metric, n_jobs: cdist(x, y, metric)
    sys.modules |= {"sklearn": sklearn, "sklearn.metrics": sklearn.metrics}
    from prdc import compute_prdc

    real, generated = sets()
    precision, recall = calculate_precision_recall_full(generated.double(), real.double(), 3)
    naeem = compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=5)
    kid = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    return {
        "kid": float(kernel_mmd(real[:65].double().numpy(), generated.double().numpy(), **kid)),
        "precision": precision,
        "recall": recall,
        "density": float(naeem["density"]),
        "coverage": float(naeem["coverage"]),
    }


def _isc() -> dict:
    from torch_fidelity.metric_isc import isc_features_to_metric

    scores = isc_features_to_metric(logits(), splits=5, shuffle=False)
    return {"mean": scores["inception_score_mean"], "deviation": scores["inception_score_std"]}


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(_ask(), indent=1) + "\n")
