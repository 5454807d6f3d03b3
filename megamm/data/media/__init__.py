"""Pictures and sounds: what headers say, decoding, augmentation, features."""
