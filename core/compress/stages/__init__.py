"""The stages of a job. Each is a function of the job and of the results of the stages before it."""
