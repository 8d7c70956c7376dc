def others(rounds, folder): pass
