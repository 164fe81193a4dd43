import sys
from pathlib import Path

# Modules beside this one; spawned processes import them by name too.
sys.path.insert(0, str(Path(__file__).parent))
