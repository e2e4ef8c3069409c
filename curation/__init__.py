"""From collected pictures to a training set: scan, filter, dedup, contamination, caption, balance, export.

Each `.py` beside this file is a command; `run` does all of them from one YAML file. `shards/` runs work shard by
shard, `records/` reads and writes data, `rules/` decides from numbers, `models/` holds what needs a network.
`docs/curation.md` goes through it. The paper names "meticulous data curation" and does not publish it: what is here
follows the published practice of LAION, Emu2 and BLIP3-o, and claims nothing about the paper's data.
"""
