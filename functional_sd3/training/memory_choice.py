"""Sizes of a training step on which its memory depends."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from functional_sd3.parallel.mesh import BATCH_AXES, ONE_PROCESS, Mesh
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import controlnet


@dataclass(frozen=True)
class Choice:
    """Sizes of a run on which its memory depends.

    batch: images of a step, in `accumulate` parts. side: of the latents, or of the images of the autoencoder. tokens:
    of the context. rule, dtype, lora, text_encoders, decoder_only: as in `tasks.Settings`. control: config of a
    ControlNet that learns. word: encoder -> vectors of a word that learns. autoencoder: True if it is what learns.
    stored: dtype of the frozen parameters. remat, base (a dtype of one byte), swapped (blocks that stay on the host):
    the options --remat, --base and --block-swap. encoders: True if frozen text encoders are in memory. mesh: only its
    sizes count.
    """

    batch: int
    side: int
    tokens: int
    accumulate: int = 1
    rule: UpdateRule = UpdateRule()
    dtype: torch.dtype | None = None
    stored: torch.dtype = torch.bfloat16
    lora: int = 0
    text_encoders: bool = False
    control: controlnet.Config | None = None
    word: Mapping[str, int] = field(default_factory=dict)
    autoencoder: bool = False
    decoder_only: bool = False
    remat: bool = False
    base: bool = False
    swapped: int = 0
    encoders: bool = True
    mesh: Mesh = ONE_PROCESS

    @property
    def is_base_frozen(self) -> bool:
        """True if the transformer does not learn, or by a LoRA alone."""
        return bool(self.lora or self.control or self.word)

    @property
    def computed(self) -> torch.dtype:
        """The dtype of the computation."""
        return self.dtype or (torch.float32 if self.is_base_frozen else self.rule.weights)

    @property
    def samples(self) -> int:
        """Samples of one part of the batch of one process."""
        return max(1, self.batch // self.accumulate // self.mesh.size(*BATCH_AXES))
