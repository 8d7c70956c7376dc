def compression(rounds, folder): pass
def eight_bits(rounds, folder): pass
