"""What `infovla <command>` does: each file a few commands, with their options."""
