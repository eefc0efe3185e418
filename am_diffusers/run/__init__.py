"""From a config to objects to a result folder: plan, load, build, execute, resume, share."""
