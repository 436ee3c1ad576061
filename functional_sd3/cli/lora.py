"""LoRAs: what is in one, merging them into a model, extracting one from a fine-tuned model."""

import argparse

from functional_sd3.cli import lora_options, options, output, report

HELP = "look into LoRAs, merge them into a model, extract one from a fine-tuned model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="say what a file holds")
    info.add_argument("file", metavar="FILE", help="a LoRA, or a folder with one")
    info.add_argument(
        "--params", metavar="PATH", action="append", help="a model, as for generate: say whether the LoRA is for it"
    )
    options.add_variant(info)
    info.add_argument("--all", action="store_true", help="a line for every layer")
    merge = actions.add_parser("merge", help="write a model with LoRAs merged into it")
    merge.add_argument("model", metavar="MODEL", help="folder of weights")
    merge.add_argument("files", nargs="+", metavar="FILE[=SCALE]", help="LoRAs, each with its strength (default 1)")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder for the merged model")
    options.add_variant(merge)
    merge.add_argument("--loose", action="store_true", help="leave out what adapts no layer of the model")
    extract = actions.add_parser("extract", help="write the LoRA nearest to what a fine-tuning changed")
    extract.add_argument("tuned", metavar="TUNED", help="folder of the fine-tuned model")
    extract.add_argument("base", metavar="BASE", help="folder of the model it was tuned from")
    options.add_variant(extract)
    extract.add_argument("--rank", type=int, default=16, help="of every adapter (default 16)")
    extract.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    extract.add_argument("--layout", choices=("peft", "kohya"), default="peft", help="of the file (default peft)")
    extract.add_argument("--targets", nargs="+", default=("*",), metavar="GLOB", help="of paths (default: all)")
    extract.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float16",
                         help="of the file (default float16)")  # fmt: skip
    extract.add_argument("--device", default="auto", help="for the decompositions: auto, cpu, cuda or mps")


def run(arguments: argparse.Namespace) -> int:
    return {"info": _info, "merge": _merge, "extract": _extract}[arguments.action](arguments)


def _info(arguments: argparse.Namespace) -> int:
    from functional_sd3 import lora, weights
    from functional_sd3.lora import read as lora_read
    from functional_sd3.lora import tree as adapters

    layers = lora.layers(arguments.file)
    numbers = sum(layer.numbers for layer in layers)
    report.say(f"{arguments.file}: {len(layers)} layers, {numbers:,} numbers")
    for line in lora_read.summary(layers):
        report.say(f"  {line}")
    for layer in layers if arguments.all else ():
        report.say(f"  {_described(layer)}")
    if arguments.params:
        config = weights.outline(arguments.params, variant=arguments.variant).config
        config = lora_options.student_config([arguments.file], config)
        loaded = lora.load_with_report(arguments.file, config, allow_absent=True)
        report.say(f"adapts {len(adapters.entries(loaded.lora))} weights of {' and '.join(arguments.params)}")
        lora_options.note_left_out(arguments.file, loaded.left_out)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from functional_sd3 import lora, weights

    output.check_folder(arguments.out)
    output.check_weights(arguments.out)
    files = [lora_options.parse(word, "") for word in arguments.files]
    model = weights.load(arguments.model, dtype="stored", variant=arguments.variant)
    model = lora_options.with_student(arguments.files, model)
    loaded = [lora.load_with_report(path, model.config, strict=not arguments.loose) for path, _ in files]
    for (path, _), one in zip(files, loaded, strict=True):
        lora_options.note_left_out(path, one.left_out)
    params = lora.apply(model.params, [one.lora for one in loaded], [scale for _, scale in files])
    weights.save(arguments.out, model._replace(params=params))
    report.say(arguments.out)
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    import torch

    from functional_sd3 import lora, weights
    from functional_sd3.cli import runtime
    from functional_sd3.core import tree
    from functional_sd3.lora import keys as lora_keys
    from functional_sd3.weights import merge, metadata

    device = runtime.device(arguments.device)
    paths, stored = (arguments.tuned, arguments.base), {"dtype": "stored", "variant": arguments.variant}
    tuned, base = (weights.load(path, **stored) for path in paths)
    names = [name for name in lora_keys.KOHYA if name in tuned.params and name in base.params]
    for name in names:
        if getattr(tuned.config, name) != getattr(base.config, name):
            raise ValueError(f"the {name} of {arguments.base} is of other sizes than that of {arguments.tuned}")
    after, before = ({name: model.params[name] for name in names} for model in (tuned, base))
    extracted = lora.extract(tree.to(after, device), before, arguments.rank, targets=tuple(arguments.targets))
    # A student's LoRA has the scheduler config of the student, as that of `distill --lora` does.
    is_student = tuned.config.schedule is not None and tuned.config.schedule.distillation is not None
    entries = metadata.write(tuned.config, ()) if is_student and tuned.config.schedule != base.config.schedule else {}
    options = {"layout": arguments.layout, "dtype": getattr(torch, arguments.dtype), "metadata": entries}
    lora.save(arguments.out, tree.to(extracted, "cpu"), **options)
    left = merge.diff(lora.apply(before, tree.to(extracted, "cpu")), after, group=merge.component)
    for whole, rest in zip(merge.diff(before, after, group=merge.component), left, strict=True):
        share = 1 - rest.relative / whole.relative if whole.relative else 1
        report.message(f"{whole.path}: changed by {whole.relative:.3g}, of which the LoRA holds {share:.1%}")
    report.say(arguments.out)
    return 0


def _described(layer) -> str:
    if not layer.rank:
        return f"{layer.name}: {layer.kind}, {layer.numbers:,} numbers"
    kind = "" if layer.kind == "LoRA" else f", {layer.kind}"
    return f"{layer.name}: {layer.inputs} -> {layer.outputs}, rank {layer.rank}, alpha {layer.alpha:g}{kind}"
