"Public names keep the import paths they had, wherever the code has moved since."

import importlib

import pytest

# module -> its public names when code began to move; later ones need not be added
NAMES = {
    "annealing_kd": """
        annealing_loss AnnealingKD phi recipe temperature_schedule
    """,
    "benchmark": """
        characters_teacher chosen_lr correct digits_teacher DIGITS_TRAIL kept_student
        ladder ladder_plot ladder_table noisy_rows pack provenance read_record
        recorded reported run_calls run_ladder run_one run_settings Rung scored shifts
        spoil standing train_one train_teacher training_rows unpack write_json
        write_teacher_record
    """,
    "combined_kd": """
        adversarial_gap AdversarialStep CombinedKD gap generator_step given_embeddings
        mate_recipe MateKD mixed_embeddings play recipe Rewriter sample_words
    """,
    "continuation_kd": """
        check_psi ContinuationKD hinge_loss linear_psi mixed_loss paper_psi recipe
        stage_phi step_psi
    """,
    "data": """
        Archive ARCHIVES cache_dir clean_rated damaged disagreement fetch FetchError
        GLUE hide_labels human_probs load_task one_rater RATED rater_accuracy
        read_rated seeded_order sha256_of SPLITS stratified_order unpack
    """,
    "distillation": """
        annotate copied encode fingerprint forward hinton_loss INPUTS joined
        length_sorted logit_mse logits_of predict_logits reduce_loss results_dir Rows
        save_tensors soft_target_loss soft_targets text_crc whole_file with_column
    """,
    "evaluation": """
        accuracy agreement attack Attacked Difference ece evaluate mcnemar nll
        OUT_OF_DOMAIN out_of_domain paired_difference rater_gap reliability
        show_changes wilson_interval
    """,
    "glitter": """
        angular_distance annotate_pool Chooser encode_pool Glitter glitter_loss
        keep_closest make_pool pool_inputs pool_losses recipe score_pool select_worst
        WAYS
    """,
    "kronecker": """
        Factors flops kronecker_error kronecker_linear KroneckerEmbedding kroneckerize
        KroneckerLinear nearest_kronecker other_shape rearranged replace_layers
        several_factors Spec spec_layers Contraction contraction_for
    """,
    "kronecker_bert": """
        at_holes bert_spec from_bert Inside inside intermediate_losses
        KroneckerBertConfig KroneckerBertForMaskedLM
        KroneckerBertForSequenceClassification KroneckerBertModel preset PRESETS
        pretraining_recipe PretrainingKD recipe TaskKD watched with_encoder
    """,
    "landscape": """
        direction_to Estimate hessian_trace logit_line logit_surface moved pca_plane
        plane project random_direction sharpness surface_of trained_weights
    """,
    "models": """
        character_student cnn_student image_net ImageNet load_tokenizer lstm_student
        num_parameters Output pca_embeddings student teacher TextCNN TextLSTM
    """,
    "noisy_label_kd": """
        bootstrap_targets corrupt gated_loss human_label Memorisation memorised
        out_of_fold recipe SelectiveKD small_losses SmallLossKD SoftRelabelling
        support_of supported transition_matrix
    """,
    "plots": """
        band_of bar_histogram BOOK_STYLE color_distance curve_with_band DIVERGING
        diverging_colors ink interval_plot METHOD_COLORS METHOD_LABELS METHOD_MARKERS
        method_style reliability_bars schedule_steps soft_targets_bars style
    """,
    "progressive_kd": """
        annotate_trail departure footsteps ProgressiveKD recipe Trail trail_target
    """,
    "reweighted_kd": """
        alignment check_meta draw_rows meta_gradient meta_weights per_sample_losses
        recipe reweighted_loss RWKD shifted_losses weighted_loss WeightedKD weights_of
    """,
    "swa": """
        recipe snapshot_steps SWA
    """,
    "training": """
        Callback check_recipe CrossEntropy describe fit Hinton label_loss
        LengthBuckets LogitMSE Loss lr_factor mix_seed Objective Progress Recipe Run
        score Stage stage_name stage_rows
    """,
    "universal_kd": """
        attend cg_loss check_classes HiddenKD il_loss pool_states PseudoClassifiers
        PseudoOutput recipe train_heads UniversalKD with_states
    """,
    "widgets": """
        Explore Explore2 MOST_FRAMES
    """,
    "words": """
        delete_words fill_words GRAMMAR Leaning like_case mask_tokens masked_generator
        MaskedGenerator MaskedLM nearest_words NearestWords pieces_of replace_words
        same_kind sentence_vectors SentenceVectors swap_words warm_up word_places
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_were(module):
    home = importlib.import_module(f"kdbook.{module}")
    missing = [name for name in NAMES[module].split() if not hasattr(home, name)]
    assert not missing


def test_the_workshop_has_moved_whole():
    for module in ("methods", "run", "studies", "compression", "teachers"):
        importlib.import_module(f"kdbook.lab.{module}")
