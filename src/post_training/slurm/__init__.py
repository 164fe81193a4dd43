"""Sites and Slurm: a stage's batch script, its submission, pipelines, and how runs are doing."""
