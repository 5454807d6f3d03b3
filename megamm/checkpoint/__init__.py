"""Checkpoints that exist whole or not at all, and that fit any number of ranks.

checkpoints/step_00000100/
    rank_00000.safetensors   one rank's slices of weights and moments, and its random states
    ...
    data_state.json          where the data plan stands
    ledger.jsonl             samples that were skipped so far
    manifest.json            size and hash of every file above, written last: it is the commit
"""
