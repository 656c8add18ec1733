"""Everything that is stored in SQL, one folder per resource.

All folders import `tables`. Schedules import jobs; jobs import quotas and promotions.
"""
