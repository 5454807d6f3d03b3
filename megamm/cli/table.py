"""Every subcommand, a line each."""

from __future__ import annotations

from megamm.cli import checkpoints, data, explaining, status, submit, trained, training
from megamm.cli.command import Command, recipe_argument

GROUP_HELP = {
    "data": "Check and measure shards; ask what a run made of them.",
    "checkpoint": "List, verify, prune and re-shard checkpoints.",
}
"""A word that several commands begin with -> its one line of help."""

COMMANDS = (
    Command(("recipes",), "List the shipped recipes with their parameter counts.", training.recipes_arguments, training.recipes, True),
    Command(("prepare",), "Write WebDataset shards from a raw source.", data.prepare_arguments, data.prepare),
    Command(
        ("tokenizer",), "Train the text tokenizer on the recipe's shards and lay out the vocabulary.", recipe_argument, data.tokenizer, True
    ),
    Command(("data", "index"), "Validate shards and write their sidecar indexes.", data.shards_arguments, data.index),
    Command(("data", "verify"), "Check shards against their indexes, byte for byte.", data.shards_arguments, data.verify),
    Command(("data", "plan-lengths"), "Plan the token length of every sample of a recipe.", recipe_argument, data.plan_lengths, True),
    Command(("data", "stats"), "Measure a recipe's data, or shards, from their sidecars.", data.stats_arguments, data.stats, True),
    Command(("data", "report"), "Say what a run skipped, and why.", data.report_arguments, data.report),
    Command(("data", "trace"), "List the samples of a run's step: rank, row, dataset and key.", data.trace_arguments, data.trace),
    Command(("pretrain",), "Train a recipe, or resume it.", training.pretrain_arguments, training.pretrain, True),
    Command(
        ("finetune",),
        "Train a recipe from weights of a run or an exported folder.",
        training.finetune_arguments,
        training.finetune,
        True,
    ),
    Command(("preflight",), "Check machines before they train.", training.preflight_arguments, training.preflight, True),
    Command(("submit",), "Check a job and hand it to a scheduler.", submit.arguments, submit.submit, takes_words=True),
    Command(("status",), "Say how runs are doing.", status.arguments, status.status),
    Command(("checkpoint", "list"), "List a run's checkpoints.", checkpoints.list_arguments, checkpoints.list_),
    Command(("checkpoint", "show"), "Say what a checkpoint holds.", checkpoints.argument, checkpoints.show),
    Command(("checkpoint", "verify"), "Read every byte of checkpoints.", checkpoints.verify_arguments, checkpoints.verify),
    Command(("checkpoint", "prune"), "Delete checkpoints that a good newer one replaces.", checkpoints.prune_arguments, checkpoints.prune),
    Command(
        ("checkpoint", "reshard"), "Rewrite a checkpoint for another number of ranks.", checkpoints.reshard_arguments, checkpoints.reshard
    ),
    Command(("evaluate",), "Run tasks over held-out samples.", trained.evaluate_arguments, trained.evaluate),
    Command(
        ("predict",),
        "Ask one task of pictures, sounds or histories: typed answers.",
        trained.predict_arguments,
        trained.predict,
        takes_files=True,
    ),
    Command(
        ("pseudo-label",),
        "Label samples with a model; write those that it is sure of.",
        trained.pseudo_label_arguments,
        trained.pseudo_label,
    ),
    Command(("generate",), "Ask a run or an exported folder.", trained.generate_arguments, trained.generate),
    Command(("explain",), "Show what in a picture, a sound or a text made an answer.", explaining.explain_arguments, explaining.explain),
    Command(("export",), "Write a Hugging Face folder from a run, with proof that it matches.", trained.export_arguments, trained.export),
)
