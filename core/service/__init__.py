"""All that lives in SQL, a folder a resource. `tables` stands below the others; schedules stand on jobs, jobs on quotas and promotions."""
