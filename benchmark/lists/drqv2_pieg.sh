# PIE-G on DMC-GB (Yuan et al. 2022): one line per row of a table or point of a figure, one run per task.
# seeds: 5; the paper does not say how many
#
#     python benchmark/launch.py benchmark/lists/drqv2_pieg.sh --core    # PIE-G, DrQ-v2 and SVEA; skips finished runs
#
# 1M frames per task. Needs a network (the ImageNet weights), `make dmcgb`, torchvision's small Places365 in
# data/places365, and a GPU. DrawerWorld needs `make drawerworld`. The authors' code has no other values than these.
#
# GPU-hours per seed: the paper states none. At least 50 for the core set and 110 for all, estimated from DrQ-v2 alone,
# the fastest method here (Yarats et al. 2021: 8 hours for most tasks, of 3M frames).
#
# No line: Table 1's DrQ and TLDA, methods that no script here has.
PLACES=data/places365/data_256_standard
TASKS="cartpole-swingup walker-stand walker-walk ball_in_cup-catch cheetah-run finger-spin"
LOOKS="--eval-every 100000 --eval-modes color_easy color_hard video_easy video_hard"
SEEN="--overlay-dir $PLACES $LOOKS"

# Table 1: PIE-G, and from the same script DrQ-v2 and DrQ-v2 with overlaid pictures, which is close to SVEA.
for task in $TASKS; do
    python algos/drqv2_pieg.py --env-id $task --exp-name pieg $SEEN  # core
    python algos/drqv2_pieg.py --env-id $task --exp-name drqv2 --encoder drqv2 --strong-augmentation none $LOOKS  # core
    python algos/drqv2_pieg.py --env-id $task --exp-name svea --encoder drqv2 $SEEN  # core
done

# Table 3: the layer after which the encoder is cut. Layer 2 is Table 1's.
for task in walker-walk cheetah-run walker-stand; do
    for layer in 1 3 4; do
        python algos/drqv2_pieg.py --env-id $task --exp-name layer$layer --encoder-layer $layer $SEEN
    done
done

# Figure 4b: batch normalisation that keeps the pretrained statistics. The one that adapts is Table 1's; it is also
# evaluated with the statistics of training.
for task in $TASKS; do
    python algos/drqv2_pieg.py --env-id $task --exp-name fixed --batch-norm fixed $SEEN
    python benchmark/analyses/evaluate.py @pieg/$task --eval-batch-norm running
done

# Figures 2 and 5, and a number of the text: features of one state under two backgrounds, by encoder and by layer.
python benchmark/analyses/feature_maps.py PIE-G=@pieg/walker-walk SVEA=@svea/walker-walk layer1=@layer1/walker-walk \
    layer3=@layer3/walker-walk layer4=@layer4/walker-walk --out @/.

# Figure 4a: deformed shapes, whose factors are ours. Table 2: DrawerWorld. `test` plays the runs on all variants.
on_suite() {
    suite=benchmark/suites/$1.py
    task=$2
    python $suite drqv2_pieg --env-id $task --exp-name pieg --overlay-dir $PLACES
    python $suite drqv2_pieg --env-id $task --exp-name drqv2 --encoder drqv2 --strong-augmentation none
    python $suite drqv2_pieg --env-id $task --exp-name svea --encoder drqv2 --overlay-dir $PLACES
    for name in pieg drqv2 svea; do
        python $suite test @$name/$task
    done
}
on_suite manipulation reach-duplo
on_suite drawerworld drawer-close
on_suite drawerworld drawer-open
