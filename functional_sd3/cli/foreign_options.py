"""Options of diffusers' scripts, AUTOMATIC1111 and Stability's reference, and the ones here that do the same."""

_NAMES = {
    "--steps": "num-inference-steps inference-steps num-steps sampling-steps sample-steps",
    "--cfg": "guidance-scale cfg-scale scale guidance-strength",
    "--negative": "negative-prompt neg-prompt uncond",
    "--size": "width height resolution w h image-size",
    "--method": "sampler sampler-name sampling-method sampling-algorithm scheduler solver",
    "--params": "model models model-id model-path model-name ckpt ckpt-path checkpoint checkpoint-path "
    "pretrained-model-name-or-path model-folder diffusion-model unet vae vae-path clip-l clip-g t5 t5xxl",
    "--count": "n num-images num-images-per-prompt num-samples n-samples n-iter batch-count",
    "--batch": "batch-size bs",
    "--strength": "denoise denoising-strength",
    "--image": "init-image init-img input-image source-image img",
    "--out": "o output output-dir output-path outdir out-dir save-path save-dir outfile",
    "--mask": "mask-image mask-img",
    "--soften": "mask-blur blur",
    "--seed": "seeds manual-seed random-seed",
    "--dtype": "precision torch-dtype weight-type",
    "--guidance skip-layer:layers=7,8,9": "slg skip-layers skip-guidance-layers skip-layer-guidance slg-scale "
    "skip-layer-guidance-scale",
    "--offload": "lowvram medvram low-vram cpu-offload enable-model-cpu-offload model-cpu-offload",
    "--block-swap": "sequential-cpu-offload enable-sequential-cpu-offload blocks-to-swap group-offload",
    "--tile": "tiling tiled tile-size",
    "--controlnet": "control-net control-net-path controlnet-path controlnet-ckpt",
    "--control": "control-image controlnet-cond-image control-cond-image",
    "--lora": "loras lora-weights lora-path lora-model-dir",
    "--embedding": "textual-inversion embeddings embeddings-dir ti",
    "--prompts": "prompt-file prompts-file from-file",
    "--weighted": "prompt-weighting emphasis",
}
EQUIVALENTS = {name: option for option, names in _NAMES.items() for name in names.split()}
"""Name of an option elsewhere, in small letters with hyphens and without those before it -> the option here."""
