"""The stages of a job, each a function of the job and of what the stages before it left."""
