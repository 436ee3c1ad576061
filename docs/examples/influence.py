"""Which training images a model's loss on a test image depends on: influence functions, checked by leaving images out.

The last layer of the shipped model is fine-tuned to the optimum of the damped flow loss of n images. Without image i
the loss of a test image is higher by about <g_test, H^-1 g_i> / n (Koh and Liang 2017, arXiv:1703.04730).
"""

import torch

import functional_sd3 as sd3


def solve(product, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """x of product(x) = right by conjugate gradients, for a symmetric positive definite product."""
    x, residual, direction = torch.zeros_like(right), right, right
    for _ in range(iterations):
        moved, square = product(direction), residual.square().sum()
        length = square / (direction * moved).sum()
        x, residual = x + length * direction, residual - length * moved
        direction = residual + residual.square().sum() / square * direction
    return x


def main(count: int = 24, damping: float = 0.3, left_out: int = 4, iterations: int = 8) -> list[tuple[float, float]]:
    """Predicted and true change of the test loss without an image, for those of the largest predicted change."""
    model = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    images, captions = sd3.shapes.images(sd3.prng.key(0), count + 1)
    with torch.no_grad():
        latents = sd3.pipeline.encode_images(model.params, model.config, images / 255)
        text = sd3.pipeline.encode(*model, captions).positive
    data = {"latents": latents, **text._asdict(), "key": sd3.prng.split(sd3.prng.key(1), count + 1)}
    flow, flat = sd3.losses.flow_loss(model.config), sd3.tree.flatten_paths(model.params["transformer"])
    start = flat["final.out.weight"]

    def loss(weight: torch.Tensor, image: dict[str, torch.Tensor]) -> torch.Tensor:
        params, rows = {**flat, "final.out.weight": weight}, {name: leaf[None] for name, leaf in image.items()}
        return flow({"transformer": sd3.tree.unflatten_paths(params)}, rows, rows.pop("key"))[0]

    def newton(weight: torch.Tensor, rows: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
        """H^-1 right of the damped loss of some images; right is its gradient by default: the step to its optimum."""
        own = {name: leaf[rows] for name, leaf in data.items()}
        losses = lambda w: torch.func.vmap(loss, (None, 0))(w, own)  # noqa: E731
        total = lambda w: losses(w).sum() / count + damping / 2 * (w - start).square().sum()  # noqa: E731
        right = torch.func.grad(total)(weight) if right is None else right
        return solve(lambda v: sd3.transform.hvp(total, weight, v), right, iterations)

    rows, test = torch.arange(1, count + 1), {name: leaf[0] for name, leaf in data.items()}
    best = start - newton(start, rows)  # exactly, as the loss is quadratic in the last layer
    gradients = sd3.transform.per_sample_grads(loss)(best, {name: leaf[1:] for name, leaf in data.items()})
    sensitivity = newton(best, rows, torch.func.grad(loss)(best, test))
    predicted, results = (gradients * sensitivity).sum((1, 2)) / count, []
    print("test image:", captions[0])
    for row in rows[predicted.abs().argsort(descending=True)[:left_out]].tolist():
        without = best - newton(best, rows[rows != row])
        results.append((float(predicted[row - 1]), float(loss(without, test) - loss(best, test))))
        print("predicted {:+.1e}, true {:+.1e} without:".format(*results[-1]), captions[row])
    return results


if __name__ == "__main__":
    main()
