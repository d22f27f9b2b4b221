"""Checkpoints: folders that are either whole or absent, and known to be whole when they are read.

    <run>/checkpoints/step-00001000/
        model.json           the ModelConfig
        state.pt             step, counters, the random generators' states; tensors and plain values, loaded
                             weights_only
        manifest.json        format, version, step, the tokenizer's hash; size and SHA-256 of every other file, and its
                             own

and the tensors. Those of one process:

        model.safetensors    parameters
        state.pt             also the optimizers' states

Those of several processes, whether each holds the model (DDP) or a share of it (FSDP2), by
torch.distributed.checkpoint:

        shards/              __<rank>_0.distcp, what that rank wrote; .metadata, which tensor lies where

What was saved by any number of processes is read by any other number, none included: generate, eval, export-hf and
replay open both.

Everything is written to a temporary folder, flushed to disk and renamed (files.new_folder), and only then do older
checkpoints go. A crash at any point, of any rank, leaves the previous checkpoint in place and at most a temporary
folder, which the next save removes. Loading reads every file against the manifest first. There is no reading without
one: what an earlier rooflight wrote, before there were manifests, cannot be told from what a disk has lost.
"""

from .folder import DamagedCheckpoint, check_tokenizer, find_checkpoint, list_checkpoints, set_aside
from .loading import load_checkpoint, load_extra, load_latest, load_model, read_model_config
from .saving import BackgroundSaves, save_checkpoint

__all__ = [
    "BackgroundSaves",
    "DamagedCheckpoint",
    "check_tokenizer",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_extra",
    "load_latest",
    "load_model",
    "read_model_config",
    "save_checkpoint",
    "set_aside",
]
