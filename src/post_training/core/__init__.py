"""What every other package uses: errors, files, hashes, locks, processes, secrets and YAML.

The standard library and PyYAML only.
"""
