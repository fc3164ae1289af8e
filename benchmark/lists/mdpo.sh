# MDPO on Procgen (Xie et al. 2025): one line per curve of a figure, one run per game.
#
#     python benchmark/launch.py benchmark/lists/mdpo.sh --seeds 3    # the authors' seeds; skips finished runs
#     bash benchmark/lists/mdpo.sh                                    # one seed, one run after the other
#
# Hard mode, 500 levels, 50M steps per agent; meant for a GPU. All returns of the paper are in figures.
GAMES="bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja
    plunder starpilot"

# Figure 3 and appendix E.1: returns on unseen and on training levels. Table 1 and figures 4 and 13 use these runs.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo
    python algos/mdpo.py --env-id $game --exp-name ppo --num-agents 1
done

# Figures 10 and 11: Simple Policy Optimization in place of PPO.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo_spo --policy-loss spo
    python algos/mdpo.py --env-id $game --exp-name spo --num-agents 1 --policy-loss spo
done

# Figures 6 and 12: PPO with network, batch and steps doubled. The paper does not say how the network is doubled: twice
# as wide, or so much wider that it has as many weights as two. It names no game but fruitbot.
DOUBLED="--num-agents 1 --num-envs 128 --total-timesteps 100000000"
for game in $GAMES; do
    for network in doubled doubled_equal; do
        python benchmark/suites/ablations.py mdpo $network --env-id $game --exp-name ppo_$network $DOUBLED
    done
done

# Figure 5: PPO on a frozen encoder. It needs a finished run of the first group, whose folder only you know:
#     python benchmark/suites/ablations.py mdpo frozen --encoder runs/<folder of mdpo or ppo> --seed 1

# Not in the paper: two agents that never learn from each other, so that all that MDPO adds is gone.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name apart --distill-coef 0
done

# The authors' code evaluates after each iteration, on about ten episodes.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo_code --eval-every 16384 --eval-episodes 10
    python algos/mdpo.py --env-id $game --exp-name ppo_code --num-agents 1 --eval-every 16384 --eval-episodes 10
done
