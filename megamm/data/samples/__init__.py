"""What a shard means: mappings, chats, encoding, planned lengths, datasets."""
