"""Shards: what is in them, in which order it is seen, how it is decoded; and the shapes made here."""

import os

os.environ["WDS_SECURE"] = "1"  # webdataset reads it when imported: no pickles, no shells; workers inherit it
