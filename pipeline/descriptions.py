"""Descriptions of a recipe's choices: the help of the command line and the fields of `Recipe` are this one text.

What stands in brackets is the default. Apart from `Recipe`, so that `--help` answers before pydantic is loaded.
"""

DESCRIPTIONS = {
    "base": ("Folder of the pre-trained checkpoint: a path, s3://, gs:// or az://, or org/name[@revision] on the Hub."),
    "finetuned": (
        "Folder of the fine-tuned checkpoint; runs/latest is the newest in runs/ where nothing has that name."
    ),
    "out": (
        "Folder for the pruned checkpoint, or hf://org/name; may hold {date}, {time}, {base}, {finetuned}, "
        "{method}, {scope} and {density}."
    ),
    "merged": (
        "Of a merge the fine-tuned checkpoints, each with its finetuned, weight, method, density, scope and seed; "
        "what one does not say is the recipe's."
    ),
    "combine": (
        "How a merge puts together what is kept of each: sum, mean, ties, slerp, model-stock, first, last or error.  "
        "[sum]"
    ),
    "scaling": "λ, by which a merge multiplies what it adds to base.  [1]",
    "density": "Share of the elements that stay fine-tuned, 0 to 1; for wise-ft it is α.  [0.1]",
    "method": "fapm, magnitude, relative, random, dare, wise-ft, dg-hard, timber or low-rank.  [fapm]",
    "strength": "Of dg-hard: by how much its threshold is higher than that for noise, 0 to 1,000,000.  [1]",
    "rank": "Of low-rank: singular values that are kept of each matrix, 1 to 1,048,576.  [16]",
    "tail": "Of timber: what singular values beyond the effective rank are multiplied by, 0 to 1.  [0]",
    "scope": "What shares one budget: tensor, layer or global.  [tensor]",
    "layer_scale": (
        "Factors A:B of what is kept: A in the first layer of a stack and outside of layers, B in the last, between "
        "them what lies between.  [none, as by 1:1]"
    ),
    "rules": (
        "What becomes of the tensors whose name matches: prune, base, finetuned, or a density of their own. "
        "The first match decides; rules given here replace the recipe's. Repeatable."
    ),
    "renames": (
        "base's names that begin with FROM are finetuned's that begin with TO; *FROM*=*TO* is the same in the"
        " middle of a name, *FROM=*TO at its end. Repeatable."
    ),
    "unpaired": (
        "Where weights of one side have no partner on the other that they should have: error, or pass to take"
        " finetuned's as they are and leave out base's.  [error]"
    ),
    "plain_codes": "FP8 tensors without scales are a plain cast: the values that they spell.",
    "allow_pickle": (
        "Look into pickled checkpoints (.bin, .distcp), in a process without network that can write nothing."
    ),
    "allow_same": "base and finetuned may be one checkpoint, whose copy the output then is.",
    "strict": "Let warnings be errors: nothing is written where there is anything to warn of.",
    "allow_code": "Copy Python and auto_map of the fine-tuned checkpoint too; it is never run.",
    "emit": (
        "checkpoint; delta, the sparse task vector: what differs from base; both; or adapter, what a matrix method "
        "keeps as a LoRA adapter for PEFT.  [checkpoint]"
    ),
    "on_conflict": (
        "Where several sparse task vectors write different values to one place: error, first or last.  [error]"
    ),
    "reversible": "Let the sparse task vector carry base's values too, so that it can be taken back without base.",
    "delta_compression": "zstd or none.  [zstd]",
    "dtype": "bfloat16, float16, float32 or float64.  [finetuned's]",
    "seed": "For random and dare; 0 to 9,223,372,036,854,775,807.  [0]",
    "nonfinite": "At NaN and Inf: error, or base for base's value.  [error]",
    "shard_size": "Largest file to write, at least 1KiB.  [an eighth of all, 256MiB to 1GiB]",
    "memory": "Budget of each worker, at least 64MiB.  [1GiB]",
    "device": "cpu, or for a GPU, AMD's too, cuda or cuda:N; auto takes one if it is there.  [auto]",
    "device_memory": "Of its GPU for each worker, at least 256MiB.  [its share of what is free, less a margin]",
    "staging": "Where an output for the Hub is put together, seen by all workers.  [a folder of this user's cache]",
    "alone": "No other run can be at work in OUT: write to a store too that lets two make the same lock.",
    "visibility": "Of a new repository: private or public.  [private]",
    "workers": (
        "How many work at once, 1 to 100,000; on Ray, begin with MIN and ask for MAX.  [one for each core or GPU]"
    ),
    "cpus_per_worker": (
        "On Ray, 1 to 1,024: a worker deals with as many shards at once, each with its part of --memory.  [1]"
    ),
    "gpus_per_worker": "On Ray: 0 to 1; 0.5 lets two share a GPU.  [1 where there are GPUs]",
    "accelerator": "On Ray: a type of GPU, as A100; see ray.util.accelerators.",
    "labels": "On Ray: only nodes with this label, as market-type=!spot. Repeatable.",
}
