"""Files written atomically, in a local folder or an object store."""
