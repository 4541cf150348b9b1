"""Everything that talks to other ranks: vocabulary shards, pipeline passes, process groups."""
